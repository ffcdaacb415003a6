import copy
import pickle

import pytest
from problems import Quadratic

from bilevel_lightning import MEHA, SOBA, TRHG, algorithms


@pytest.mark.parametrize("name", algorithms.__all__)
def test_modules_are_pickled_with_their_default_optimizers(name):
    module = getattr(algorithms, name)(task=Quadratic())
    for again in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert again.upper_optimizer is module.upper_optimizer
        assert again.hparams == module.hparams
        assert again.state_dict().keys() == module.state_dict().keys()


def test_a_subclass_may_have_a_default_of_its_own_or_that_of_a_base():
    sgd, inherited = (pickle.loads(pickle.dumps(a())).upper_optimizer for a in (MEHA, TRHG))
    assert sgd is not inherited
    assert sgd is MEHA().upper_optimizer


def test_other_lambdas_are_not_taken_for_defaults():
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(SOBA(upper_optimizer=lambda params: None))
