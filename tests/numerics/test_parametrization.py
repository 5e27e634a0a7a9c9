import math

import pytest
import torch

from diffusers_fastdiff.numerics.parametrization import PREDICTION_TYPES, prediction_target, to_denoised, to_epsilon


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.95])
def test_target_leads_back_to_data_and_noise(prediction_type, sigma):
    clean, noise = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    alpha = 1 - sigma if prediction_type == "flow_prediction" else math.sqrt(1 - sigma**2)
    noisy = alpha * clean + sigma * noise
    output = prediction_target(clean, noise, alpha, sigma, prediction_type)
    torch.testing.assert_close(to_denoised(output, noisy, alpha, sigma, prediction_type), clean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(to_epsilon(output, noisy, alpha, sigma, prediction_type), noise, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [prediction_target, to_denoised, to_epsilon])
def test_unknown_prediction_types_are_refused(function):
    x = torch.zeros(1)
    with pytest.raises(ValueError, match="prediction_type"):
        function(x, x, 1.0, 0.0, "score")
