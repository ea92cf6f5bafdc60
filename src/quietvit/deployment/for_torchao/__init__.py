"""torchao: a torch model whose linears multiply integers, and its folder on disk."""
