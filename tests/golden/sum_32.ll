; ModuleID = "golden_sum_32_71760a7b"
target triple = "x86_64-unknown-linux-gnu"
target datalayout = ""

define void @"golden_sum_32_71760a7b"(ptr %".1", ptr %".2", i64 %".3") nounwind
{
entry:
  %".5" = getelementptr inbounds i64, ptr %".2", i64 0
  %".6" = load i64, ptr %".5", align 8
  %".7" = getelementptr inbounds i64, ptr %".1", i64 0
  %".8" = load ptr, ptr %".7", align 8
  %".9" = getelementptr inbounds i64, ptr %".1", i64 1
  %".10" = load ptr, ptr %".9", align 8
  %".11" = getelementptr inbounds i64, ptr %".1", i64 2
  %".12" = load ptr, ptr %".11", align 8
  %".13" = load i64, ptr %".12", align 8
  %".14" = getelementptr inbounds i64, ptr %".1", i64 3
  %".15" = load ptr, ptr %".14", align 8
  %".16" = getelementptr inbounds i64, ptr %".15", i64 0
  %".26" = alloca <4 x float>, i32 1, align 16
  br label %"tile"
tile:
  %".18" = atomicrmw add ptr %".16", i64 1 seq_cst
  %".19" = icmp slt i64 %".18", %".13"
  %".20" = getelementptr inbounds i64, ptr %".2", i64 1
  %".21" = load ptr, ptr %".20", align 8
  %".22" = load atomic i64, ptr %".21" seq_cst, align 8
  %".23" = icmp eq i64 %".22", 0
  %".24" = and i1 %".19", %".23"
  br i1 %".24", label %"tile.body", label %"tile.done"
tile.body:
  store <4 x float> <float              0x0, float              0x0, float              0x0, float              0x0>, ptr %".26"
  br label %"head"
tile.done:
  ret void
head:
  %".29" = phi  i64 [0, %"tile.body"], [%".39", %"body"]
  %".30" = icmp slt i64 %".29", 32
  br i1 %".30", label %"body", label %"done"
body:
  %".32" = mul i64 %".18", 32
  %".33" = add i64 %".32", %".29"
  %".34" = getelementptr inbounds float, ptr %".10", i64 %".33"
  %".35" = load <4 x float>, ptr %".34", align 4
  %".36" = load <4 x float>, ptr %".26"
  %".37" = fadd contract <4 x float> %".36", %".35"
  store <4 x float> %".37", ptr %".26"
  %".39" = add i64 %".29", 4
  br label %"head"
done:
  %".41" = load <4 x float>, ptr %".26"
  %".42" = shufflevector <4 x float> %".41", <4 x float> %".41", <2 x i32> <i32 0, i32 1>
  %".43" = shufflevector <4 x float> %".41", <4 x float> %".41", <2 x i32> <i32 2, i32 3>
  %".44" = fadd contract <2 x float> %".42", %".43"
  %".45" = extractelement <2 x float> %".44", i32 0
  %".46" = extractelement <2 x float> %".44", i32 1
  %".47" = fadd contract float %".45", %".46"
  %".48" = getelementptr inbounds float, ptr %".8", i64 %".18"
  store float %".47", ptr %".48", align 4
  br label %"tile"
}
