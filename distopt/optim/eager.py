"""What torch.compile leaves as it is: a function that runs as an island of eager code in a compiled one."""

import torch

# Private, as torch 2.13's own optimizers use it. The public torch.compiler.disable imports dynamo where it decorates,
# which would take as long as the rest of `import distopt`; this one does so at the first call.
eager_island = torch._disable_dynamo
