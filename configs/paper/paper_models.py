"""The study's four models: their shapes, the mesh that each is trained on, and the TPUs for it.

shapes/<name>/config.json has the sizes from each model's public config.json, and no weights. `mice plan` reads it if
there is no Hugging Face folder models/<name>, and `models=random:configs/paper/shapes` starts from random weights.
The study's exact checkpoints are not known. These are used: granite-7b-base (which says that its architecture is
LLaMA's; the sizes are those of Llama 2 7B), granite-3b-code-base (the only Granite model of about 3 billion parameters
with that architecture), Llama-3.2-3B and Mistral-7B-v0.3.
"""

from mice_jax.config import Mesh

FSDP = Mesh(data=1, fsdp=-1, tensor=1)  # parameters are sharded over all devices
POD = Mesh(data=8, fsdp=-1, tensor=1)  # eight copies, each sharded over an eighth of the devices

# TPUs on which each model fits with rows of 4,096 tokens. `make test-aot` compiles each of these pairs.
TOPOLOGIES = {
    "granite-7b": "v5p:2x2x2",
    "granite-3b": "v5p:2x2x1",
    "llama-3.2-3b": "v5e:4x4",
    "mistral-7b": "v5p:2x2x2",
}
POD_TOPOLOGY = "v5p:8x8x8"  # 512 chips
MODELS = tuple(TOPOLOGIES)
