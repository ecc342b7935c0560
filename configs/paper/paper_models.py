"""The study's four models: their shapes, the mesh that each is trained on, and the TPUs that this is meant for.

shapes/<name>/config.json has what the public config.json of each says of its sizes, no weights: `mice plan` reads it
where you have no Hugging Face folder models/<name>, and `models=random:configs/paper/shapes` starts a fresh model from
it. The study's exact checkpoints are not known; taken here are granite-7b-base (it says: the architecture of LLaMA;
the sizes are those of Llama 2 7B), granite-3b-code-base (its one model of about 3 billion parameters of that
architecture), Llama-3.2-3B and Mistral-7B-v0.3.
"""

from mice_jax.config import Mesh

FSDP = Mesh(data=1, fsdp=-1, tensor=1)  # the parameters over all devices
POD = Mesh(data=8, fsdp=-1, tensor=1)  # eight whole copies, each over an eighth of the devices

# TPUs on which each has room for rows of 4,096 tokens; `make test-aot` compiles each of these pairs.
TOPOLOGIES = {
    "granite-7b": "v5p:2x2x2",
    "granite-3b": "v5p:2x2x1",
    "llama-3.2-3b": "v5e:4x4",
    "mistral-7b": "v5p:2x2x2",
}
POD_TOPOLOGY = "v5p:8x8x8"  # 512 chips
MODELS = tuple(TOPOLOGIES)
