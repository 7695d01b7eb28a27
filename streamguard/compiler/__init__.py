"""From a policy and a tokenizer to the frozen tables that the kernels walk."""
