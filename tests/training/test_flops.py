import pytest
import torch
from torch import nn

from gigatome.encoders.dilated import DilatedOptions, dilated_attention
from gigatome.training.flops import FlopCounter, measured_flops, peak_tflops, speed


def test_products_are_counted_forward_and_backward_once_for_each_shape():
    linear, counter = nn.Linear(5, 7), FlopCounter({})
    images = torch.rand(3, 5)
    for _ in range(2):
        with counter.counting([images]):
            linear(images).sum().backward()
    assert counter.of([images]) == 2 * 3 * 5 * 7 * 2  # no gradient of the images is needed
    with counter.counting([images[:2]]):
        linear(images[:2])
    assert counter.of([images[:2]]) == 2 * 2 * 5 * 7
    assert counter.counts == {"3x5": 420, "2x5": 140}


def test_what_is_known_is_not_counted_again():
    counter = FlopCounter({"1x5": 11})
    with counter.counting([torch.rand(1, 5)]):
        torch.rand(4, 4) @ torch.rand(4, 4)
    assert counter.counts == {"1x5": 11}


def test_attention_is_counted():
    q, counter = torch.rand(1, 2, 16, 8), FlopCounter({})
    with counter.counting([q]):
        nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.of([q]) == 2 * (2 * 2 * 16 * 16 * 8)


def test_dilated_attention_is_counted():
    q, counter = torch.rand(1, 64, 2, 8, requires_grad=True), FlopCounter({})
    with counter.counting([q]):
        dilated_attention(q, q, q, DilatedOptions((16,), (1,), 2)).sum().backward()
    assert counter.of([q]) == (2 + 5) * (2 * 2 * 64 * 16 * 8)  # products forward, and backward


def test_speed_of_a_line():
    line = {"images_per_s": 200.0, "data_wait_s": 0.01}
    cpu = torch.device("cpu")
    assert speed(line, 4 * 10**12, 100, cpu, "bf16") == {"data_wait": 0.02, "tflops": 8.0}
    assert speed(line, 0, 100, cpu, "bf16") == {"data_wait": 0.02}


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA A10", "bf16", 125.0),
        ("Some other device", "bf16", None),
    ],
)
def test_peaks(device, precision, peak):
    assert peak_tflops(device, precision) == peak


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_measured_products(precision):
    found = measured_flops(torch.device("cpu"), precision)
    assert 1e8 < found < 1e15
    assert measured_flops(torch.device("meta"), precision) is None
