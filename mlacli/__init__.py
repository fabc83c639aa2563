"""mlacli: run DeepSeek-style MLA language models (GGUF files) on CPUs."""

__version__ = "0.1.0"
