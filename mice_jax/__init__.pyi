from mice_jax.api import Model as Model
from mice_jax.api import load_model as load_model

__version__: str
