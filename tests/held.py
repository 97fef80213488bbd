"""
data.py that cannot end before it is let: from the 111th document on, workers wait until the file
that HOLD names is gone. So a test that kills it in the middle does so on any machine.
"""
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from infra import shards  # noqa: E402

encode_unit = shards.encode_unit  # as it is before held takes its place


def held(unit):
    first = 37 * unit.index if isinstance(unit, shards.RowGroup) else int(unit[0].split()[0])
    while first >= 111 and os.path.exists(os.environ["HOLD"]):
        time.sleep(0.01)
    return encode_unit(unit)


if __name__ == "__main__":
    import held  # so that workers find it by name, however they are started
    shards.encode_unit = held.held
    data.told_to_end()
    data.main()
