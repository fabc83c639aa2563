"""Looking inside: graphs, kernels and the numbers between them, for people who study both."""
