"""Every loss compiled in one process, each directly: none uses up the recompilations of another."""

from __future__ import annotations

import torch

import action_kernels as ak

ROWS, LABELS = torch.randn(12, 4), torch.arange(12) % 3
BY_LABELS = {"num_classes": 3}
CALLS = {
    ak.supcon_loss: ((ROWS, LABELS), BY_LABELS),
    ak.multi_positive_nt_xent_loss: ((ROWS, LABELS), BY_LABELS),
    ak.saacl_loss: ((ROWS, LABELS, ak.class_centers(3, 4)), {}),
    ak.info_nce_loss: ((ROWS, ROWS + 1), {}),
    ak.nt_xent_loss: ((ROWS, ROWS + 1), {}),
    ak.clip_loss: ((ROWS, ROWS + 1), {}),
    ak.siglip_loss: ((ROWS, ROWS + 1), {"temperature": 0.1, "bias": -1.0}),
    ak.relational_loss: ((ROWS, ROWS + 1, ROWS[:5]), {"student_temperature": 0.1, "teacher_temperature": 0.2}),
    ak.anatomical_contrast_loss: ((ROWS.view(3, 4, 4), ROWS[:3], ROWS, LABELS.view(3, 4)), {}),
}  # fmt: skip


def test_all_losses_compile_in_one_process():
    torch._dynamo.reset()
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch({limit: len(CALLS) - 1}):  # monkeypatch would hide the option afterwards
        for loss, (arguments, options) in CALLS.items():
            compiled = torch.compile(loss, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(*arguments, **options), loss(*arguments, **options))
