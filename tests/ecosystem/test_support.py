"""Every cell of the support matrix: it works and ends where it should, or is refused with a reason."""

import pytest

from tests.ecosystem.pipelines import PIPELINES
from tests.ecosystem.support import FEATURES, WORKS

CELLS = [(feature, pipeline) for feature in FEATURES for pipeline in PIPELINES]


@pytest.mark.parametrize(("feature", "pipeline"), CELLS, ids=[f"{feature}-{pipeline}" for feature, pipeline in CELLS])
def test_cell(feature, pipeline, tmp_path):
    pipe = PIPELINES[pipeline](tmp_path)
    pipe.set_progress_bar_config(disable=True)
    if pipeline in WORKS[feature]:
        FEATURES[feature](pipe)
        return
    with pytest.raises((ValueError, TypeError)) as refusal:
        FEATURES[feature](pipe)
    assert len(str(refusal.value)) > 40
