"""A decorator for functions that torch.compile does not trace: islands of eager code in a compiled function."""

import torch

# Private, and used by torch 2.13's own optimizers. The public torch.compiler.disable imports dynamo when it decorates,
# which would take as long as the rest of `import distopt`; this one imports it at the first call.
eager_island = torch._disable_dynamo
