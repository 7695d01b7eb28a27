"""streamguard inside vLLM: the only part of the package that knows the engine.

register   what vLLM calls in every process: refuse what cannot be guarded, put the parts in place
settings   where the policy comes from, and what it compiles to for the served model
refuse     engine configurations in which the guard would not act
admission  a request's parameters, checked and completed
wire       from committed tokens back to what the client reads
processor  the logits processor of both runners; runner_v1, runner_v2 are its two bodies
attest     proof that processor and sampler are in place, in every worker
"""
