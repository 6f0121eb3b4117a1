"""Print the versions installed in this environment as constraints: `make lock`.

Only what AgentMem's own dependencies pull in is listed; the build tools are not.
"""

from __future__ import annotations

import importlib.metadata
import re


def main() -> None:
    seen: dict[str, str] = {}
    queue = ["agentmem-cluster[node,test]"]
    while queue:
        wanted = queue.pop()
        match = re.match(r"([A-Za-z0-9_.-]+)(?:\[([^]]*)\])?", wanted)
        assert match is not None, wanted
        name = re.sub(r"[-_.]+", "-", match[1]).lower()
        extras = {e.strip() for e in (match[2] or "").split(",") if e.strip()}
        key = f"{name}[{','.join(sorted(extras))}]"
        if key in seen:
            continue
        try:
            dist = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform, or an extra that is not installed
        seen[key] = dist.version
        for requirement in dist.requires or []:
            spec, _, marker = requirement.partition(";")
            named = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
            if named is None or named[1] in extras:
                queue.append(re.sub(r"\s.*|[<>=!~(].*", "", spec.strip()))
    print(
        "# Versions that the tests passed with. Made by `make lock`; pip reads it as constraints."
    )
    pins = {re.sub(r"\[.*", "", key): version for key, version in seen.items()}
    pins.pop("agentmem-cluster")
    for name, version in sorted(pins.items()):
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
