"""What the machine can do at best, what an update must move, and memory that is kept."""

import subprocess
import sys
from itertools import cycle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aroma.tuner.fused import Update, linear_with_update
from aroma_lab.bench.roofline import _PASSES, roofline
from aroma_lab.bench.settings import BenchSettings
from aroma_lab.bench.shapes import make_model
from aroma_lab.methods import encoder_linears

SETTINGS = BenchSettings(model="tiny", batch_size=2, length=8)
TOKENS = 16


def test_speeds_are_work_over_the_least_time():
    model = make_model(SETTINGS)
    seconds = cycle([0.5, 0.75, 4.0])
    found = roofline(model, SETTINGS, lambda work: [next(seconds)])
    sizes = [model.get_submodule(name).weight.shape for name in encoder_linears(model)]
    m, n = max(sizes, key=lambda shape: shape[0] * shape[1])
    assert found.multiply_flops == 2 * TOKENS * m * n / 0.5
    assert found.move_bytes == 3 * 4 * TOKENS * max(m, n) / 0.5
    assert found.backbone_operations == sum(2 * 2 * TOKENS * m * n for m, n in sizes)
    assert found.update_ms == pytest.approx(1000 * found.update_bytes / found.move_bytes)
    assert found.backbone_ms == pytest.approx(1000 * found.backbone_operations / found.multiply_flops)


class Traffic(TorchDispatchMode):
    """Counts how often matmuls read or write a tensor of so many elements."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.touched = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] in ("mm", "addmm", "addmm_", "mv", "bmm"):
            tensors = [argument for argument in (*args, result) if isinstance(argument, torch.Tensor)]
            self.touched += sum(tensor.numel() == self.elements for tensor in tensors)
        return result


@pytest.mark.parametrize(("m", "n", "counted"), [(7, 31, "inputs"), (31, 7, "outputs")])
def test_the_layer_makes_the_passes_that_the_roofline_counts(m, n, counted):
    """Matmuls of the layer touch activations as often as the frozen matrix's own, and `_PASSES` times more."""
    tokens = 3
    x, weight = torch.randn(tokens, n, requires_grad=True), torch.randn(m, n)
    a, b = torch.randn(1, n, requires_grad=True), torch.randn(m, 1, requires_grad=True)
    with Traffic(tokens * (n if counted == "inputs" else m)) as traffic:
        update = Update(torch.empty(0, n), torch.empty(m, 0), a, b, 1.0, 0.0)
        linear_with_update(x, weight, None, update).sum().backward()
    of_the_matrix = 2  # x is read and gx written; y is written and gy read
    assert traffic.touched == of_the_matrix + _PASSES


@pytest.mark.parametrize("wanted", [False, True])
def test_backward_looks_at_the_weight_only_where_x_wants_a_gradient(wanted):
    tokens, m, n = 211, 7, 31
    x, weight = torch.randn(tokens, n, requires_grad=wanted), torch.randn(m, n)
    a, b = torch.randn(1, n, requires_grad=True), torch.randn(m, 1, requires_grad=True)
    A, B = torch.randn(9, n), torch.randn(m, 9)
    y = linear_with_update(x, weight, None, Update(A, B, a, b, 1.0, 0.0))
    with Traffic(m * n) as of_weight, Traffic(9 * n) as of_components:
        y.sum().backward()
    assert (of_weight.touched > 0) == wanted
    assert of_components.touched == 0, "folded, or not needed"
    torch.testing.assert_close(a.grad, (b.T @ torch.ones(m, 1)) * x.detach().sum(0))
    torch.testing.assert_close(b.grad, ((x @ a.T).sum() * torch.ones(m, 1)).detach())


def test_the_benchmark_names_the_roofline(capsys, tmp_path):
    from aroma.cli import main

    out = tmp_path / "b.json"
    options = ["--model", "tiny", "--batch-size", "2", "--length", "8", "--rounds", "1", "--warmup-rounds", "0"]
    assert main(["bench", *options, "--only", "aroma-0", "--no-peak", "--threads", "1", "--out", str(out)]) == 0
    assert "GFLOP/s" in capsys.readouterr().out


# Memory that is freed ------------------------------------------------------------------------------------------------

FAULTS = """
import resource, sys, torch
from aroma_lab.run.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(11):
    if turn == 1:
        before = faults()
    torch.ones(2**20)  # 4 MiB, 1024 pages
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_kept_memory_is_not_mapped_again():
    def faults(how):
        # Said outright, since glibc adapts the size beyond which it maps to what a process frees.
        environment = {"PATH": "", "MALLOC_MMAP_THRESHOLD_": str(2**20)} if how == "given back" else {"PATH": ""}
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert faults("given back") > 10 * 1000
    assert faults("kept") < 1000


def test_only_glibc_can_be_told(monkeypatch):
    from aroma_lab.run import allocator

    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert allocator.keep_freed_memory() is False
