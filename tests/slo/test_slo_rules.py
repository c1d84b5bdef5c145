"""Prometheus itself reads our rules, and they fire when budgets burn; it reads our metrics, too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from latencyprism.lab.install import cache_root
from latencyprism.slo.objectives import parse_objectives
from latencyprism.slo.rules import metrics_text, prometheus_rules

TEXT = """
ttft_p99 = "< 2 s"
tpot_p95 = "< 50 ms"
[[objective]]
model = "meta/llama-70b{{x}}"
port = 8001
tenant = "gold's"
e2e_p999 = "< 1.5 min"
"""


def tool(name: str) -> str:
    """Path of a program of Prometheus, from the path or as scripts/debian_packages.py unpacks it."""
    unpacked = cache_root() / "debian/usr/bin" / name
    found = shutil.which(name) or (str(unpacked) if os.access(unpacked, os.X_OK) else None)
    if found is None:
        pytest.skip(f"{name} is not installed (scripts/debian_packages.py unpacks it)")
    return found


def run(*command: str, feed: str | None = None) -> str:
    done = subprocess.run(command, input=feed, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip() or done.stderr.strip()


@pytest.mark.parametrize("text", [TEXT, "period = '1h'\nttft = '< 1 s'", "period='60s'\nitl_p50 = '< 10 us'"])
def test_promtool_accepts_them(text: str, tmp_path: Path) -> None:
    promtool = tool("promtool")
    file = tmp_path / "rules.yml"
    file.write_text(prometheus_rules(parse_objectives(text)))
    assert "SUCCESS" in run(promtool, "check", "rules", str(file))


def series(objective: str, replica: int, violations: str) -> list[dict[str, str]]:
    labels = f'{{objective="{objective}",pid="{replica}",instance="a:1"}}'
    return [
        {"series": f"latencyprism_slo_requests_total{labels}", "values": "0+600x600"},
        {"series": f"latencyprism_slo_violations_total{labels}", "values": violations},
    ]


def test_they_fire_when_a_budget_burns_and_rest_after_it(tmp_path: Path) -> None:
    """An hour within the budget, an hour in which one of two replicas violates 40 % for a budget of 1 %, and
    rest. One sample a minute, 600 requests each."""
    promtool = tool("promtool")
    (tmp_path / "rules.yml").write_text(prometheus_rules(parse_objectives(TEXT)))
    burning = "0+3x60 180+240x60 14580+0x480"
    label = "ttft_p99"
    words = "ttft_p99 < 2 s: its budget burns {} times too fast over {}"

    def fired(burn: str, span: str, severity: str) -> dict[str, object]:
        return {
            "exp_labels": {"severity": severity, "objective": label, "long": span},
            "exp_annotations": {"summary": words.format(burn, span)},
        }

    def at(minute: int, *expected: dict[str, object]) -> dict[str, object]:
        return {
            "eval_time": f"{minute}m",
            "alertname": "LatencyPrismBudgetBurn",
            "exp_alerts": list(expected),
        }

    page, slow, ticket = fired("14.4", "1h", "page"), fired("6", "6h", "page"), fired("1", "3d", "ticket")
    test = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [*series(label, 1, burning), *series(label, 2, "0x600")],
                "alert_rule_test": [
                    at(55),
                    at(110, page, slow, ticket),
                    at(140, slow, ticket),
                    at(190, ticket),
                    at(590),
                ],
                "promql_expr_test": [
                    {
                        "expr": f'latencyprism:slo_error_ratio:rate5m{{objective="{label}"}}',
                        "eval_time": "100m",
                        "exp_samples": [
                            {
                                "labels": f'latencyprism:slo_error_ratio:rate5m{{objective="{label}"}}',
                                "value": 0.2,
                            }
                        ],
                    }
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(json.dumps(test))
    run(promtool, "test", "rules", str(tmp_path / "test.yml"))


def test_promtool_accepts_our_metrics() -> None:
    told = [
        {"pid": 1, "objective": "ttft_p99", "requests": 12, "violations": 3},
        {"pid": 2, "objective": "e2e_p999@llama:8001", "requests": 0, "violations": 0},
    ]
    text = metrics_text(told, False)
    assert 'latencyprism_slo_violations_total{objective="ttft_p99",pid="1"} 3' in text
    assert text.endswith("latencyprism_ready 0\n")
    run(tool("promtool"), "check", "metrics", feed=text)
    run(tool("promtool"), "check", "metrics", feed=metrics_text([], True))


def test_alertmanager_can_route_what_they_raise(tmp_path: Path) -> None:
    """A configuration as docs/slo.md shows it."""
    amtool = tool("amtool")
    page = (Path(__file__).parents[2] / "docs/slo.md").read_text(encoding="utf-8")
    config = page.split("```yaml\n# alertmanager.yml\n")[1].split("```")[0]
    file = tmp_path / "alertmanager.yml"
    file.write_text(config)
    run(amtool, "check-config", str(file))
    for severity, receiver in (("page", "pager"), ("ticket", "tickets")):
        labels = ("alertname=LatencyPrismBudgetBurn", f"severity={severity}", "objective=ttft_p99")
        found = run(amtool, "config", "routes", "test", f"--config.file={file}", *labels)
        assert found == receiver
