"""Write the files that are made from code: rules, alerts, the Kubernetes rule object, and the dashboards.

`python deploy/generate.py` after a change of deploy/monitoring/ or of the metrics. `--check` only says which files are
out of date.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parent
sys.path.insert(0, str(DEPLOY))

from monitoring.dashboards import DASHBOARDS  # noqa: E402
from monitoring.rules import rule_groups  # noqa: E402

_NOTE = "# Made by deploy/generate.py from deploy/monitoring/rules.py: change it there.\n"


def generated_files() -> dict[Path, str]:
    """Every generated file and its text."""
    groups = rule_groups()
    rule_object = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "vllm-expert-prefetch", "labels": {"app.kubernetes.io/name": "vllm-expert-prefetch"}},
        "spec": {"groups": groups},
    }
    files = {
        DEPLOY / "prometheus" / "rules.yml": _NOTE + _yaml({"groups": groups}),
        DEPLOY / "kubernetes" / "prometheusrule.yaml": _NOTE + _yaml(rule_object),
    }
    for dashboard in DASHBOARDS:
        path = DEPLOY / "grafana" / "dashboards" / f"{dashboard.uid}.json"
        files[path] = json.dumps(dashboard.as_json(), indent=1) + "\n"
    return files


def out_of_date() -> list[Path]:
    """Files whose text is not what the code makes."""
    return [path for path, text in generated_files().items() if not path.exists() or path.read_text() != text]


def _yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=4096)


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when a file is out of date")
    arguments = parser.parse_args()
    stale = out_of_date()
    for path in stale:
        print(path.relative_to(DEPLOY.parent))
    if not arguments.check:
        for path in stale:
            path.write_text(generated_files()[path])
    return int(bool(stale) and arguments.check)


if __name__ == "__main__":
    sys.exit(main())
