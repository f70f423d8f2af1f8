"""Every bucket of rows and contexts on a GPU: captured steps against the same without capture."""

from __future__ import annotations

import pytest

from sparring.rollout.cuda_graph import context_bucket, row_bucket
from sparring.rollout.sampler import Sampling
from tests.rollout.test_engine_gpu import adapted, assert_same, engine, flat, gpu_model, prompts

pytestmark = pytest.mark.gpu

MOST_ROWS, MOST_TOKENS = 256, 1024


def test_graphs_equal_the_steps_without_capture_in_every_bucket() -> None:
    model = adapted(gpu_model())
    settings = {
        "stop_ids": (), "max_tokens": MOST_TOKENS, "max_running": MOST_ROWS, "kv_bytes": 1 << 25,
    }  # fmt: skip
    captured = engine(model, **settings)
    plain = engine(model, cuda_graphs=False, **settings)
    rows = sorted({row_bucket(n, MOST_ROWS) for n in range(1, MOST_ROWS + 1)})
    contexts = sorted({context_bucket(n, MOST_TOKENS) for n in range(1, MOST_TOKENS + 1)})
    for context in contexts:
        asked = prompts(context // 2 + 1)
        for count in rows:
            sampling = Sampling(max_completion_tokens=5, seed=count)
            got = captured.generate(asked, sampling, num_samples=count)
            assert_same(got, plain.generate(asked, sampling, num_samples=count))
            assert len({tuple(r.token_ids.tolist()) for r in flat(got)}) > count // 2
    assert captured.graph_stats.num_graphs == len(rows) * len(contexts) == 19 * 2
