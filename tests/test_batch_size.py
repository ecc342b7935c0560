"""The default batch size on data that it does not fit, and the size that is advised instead."""

import copy
import pickle

import numpy as np
import pytest

from mice_jax.config import Config, Optim, is_set, to_dict
from mice_jax.data.batch_size import advised_batch_size, check_default_batch_size
from mice_jax.data.mixture import Mixture, PhasePools, Pool
from mice_jax.errors import UserError

pytestmark = pytest.mark.smoke


def mixture(*phases: PhasePools, batch_size: int = 100) -> Mixture:
    return Mixture(phases, batch_size=batch_size, seed=0)


def phase(samples: int, name: str = "stacked", **fields: float) -> PhasePools:
    return PhasePools(name, **({"num_epochs": 1.0, "pools": (Pool(np.arange(samples)),)} | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("samples", "size"), [(1, 32), (999, 32), (1_000, 128), (10_000, 128), (10_001, 256), (10**6, 256)]
)
def test_advised_size_follows_the_number_of_samples(samples: int, size: int) -> None:
    assert advised_batch_size(samples) == size


def test_default_is_told_from_the_same_number_set_by_the_user() -> None:
    config = Config()
    config.optim.learning_rate = 1e-5
    for same in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert not is_set(same.optim, "batch_size") and is_set(same.optim, "learning_rate")
    given = [Optim(batch_size=3840), Optim(3840), Optim()]
    given[2].batch_size = 3840
    assert [is_set(optim, "batch_size") for optim in given] == [True] * 3
    assert given == [Optim()] * 3 and to_dict(config).keys() == to_dict(Config()).keys()


def test_default_larger_than_an_epoch_is_an_error_with_a_size_to_set() -> None:
    with pytest.raises(UserError, match=r"default of 100 samples .*'stacked' \(99 samples an epoch\).*batch_size=32"):
        check_default_batch_size(mixture(phase(99)), 100)
    check_default_batch_size(mixture(phase(100)), 100)  # one full step


def test_phase_with_a_batch_size_of_its_own_does_not_use_the_default() -> None:
    own = phase(5, "late", batch_size=5)
    check_default_batch_size(mixture(phase(200), own), 100)
    with pytest.raises(UserError, match=r"the phase 'late' \(5 samples an epoch\), so"):
        check_default_batch_size(mixture(phase(200), phase(5, "late")), 100)


def test_partial_last_epoch_is_no_error_where_a_whole_one_fills_a_step() -> None:
    check_default_batch_size(mixture(phase(150, num_epochs=1.5)), 100)
    with pytest.raises(UserError, match=r"\(75 samples an epoch\)"):
        check_default_batch_size(mixture(phase(150, num_epochs=0.5)), 100)
