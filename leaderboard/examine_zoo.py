"""Has the doctor examine every defense of the zoo and keeps what it found in leaderboard/doctor; what is there is left as it is.

python leaderboard/examine_zoo.py [DATASET [NAME ...]]        digits and the whole zoo by default; training what is not trained
"""

import sys
from pathlib import Path

import torch
from robench_zoo.papers import REVISITING_ENSEMBLES
from robench_zoo.recipes import linf_threat

from robench import data, doctor, targets, workbench, zoo
from robench.errors import UserError
from robench.files import cache_folder, write_atomic
from robench.threat import ThreatModel

FOLDER = Path(__file__).resolve().parent / "doctor"
L2 = {"digits": "L2:2"}
"""The threat model that a data set's L2-robust defenses are examined within; L2:0.5 elsewhere."""


def threat_for(name: str, setting: zoo.Setting) -> ThreatModel:
    """Return the threat model that a defense of the zoo is examined within: the one that its paper is about."""
    of_l2 = zoo.parse(name).entry.paper == REVISITING_ENSEMBLES
    return ThreatModel.parse(L2.get(setting.dataset, "L2:0.5") if of_l2 else linf_threat(setting))


def main(dataset: str = "digits", *names: str) -> None:
    """Examine what was not examined yet, of these defenses or of all."""
    torch.set_num_threads(1)
    split, scale = data.load(dataset, "test"), workbench.default_scale(dataset)
    setting, examples = targets.setting_for(split, scale, seed=0), split.first(min(len(split), doctor.EXAMPLES))
    for name in names or [name for name, entry in zoo.entries().items() if not entry.alias_of]:
        threat = threat_for(name, setting)
        path = FOLDER / f"{dataset}_{name.replace('_', '-')}.json"
        if path.exists():
            continue
        target = targets.trained(zoo.parse(name), examples, scale=scale, cache=cache_folder(), progress=print)
        diagnosis = doctor.examine(target, examples, threat, scale=scale)
        FOLDER.mkdir(exist_ok=True)
        write_atomic(path, doctor.as_json(diagnosis))
        print(f"{name} within {threat}: {diagnosis.verdict} {', '.join(diagnosis.decided_by)}", flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
