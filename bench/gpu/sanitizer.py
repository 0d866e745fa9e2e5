"""What compute-sanitizer says when it cannot work on a machine: in virtual machines and sandboxes, such as gVisor, that
do not pass on the driver's interface for debuggers. Then its exit status tells nothing of what it should watch.
"""

from __future__ import annotations

import re

from bench.gpu.runner import counts_of

# A line of the tool's own, which may follow what pytest has begun; one that goes on with the line before has more
# spaces, and pytest's rules have another length.
SAYS = re.compile(r"(?<!=)={9} (\S.*)$", re.MULTILINE)
UNABLE = re.compile(
    r"Internal Sanitizer Error|Error: (?!.*(Race|hazard)).*(not supported|unsupported|incompatible|debugger|"
    r"Unable to|Failed to|No attachable process|before first instrumented API call)",
    re.IGNORECASE,
)
BESIDE = re.compile(
    r"COMPUTE-SANITIZER|.* SUMMARY: |Tracking kernels launched by|Default timeout can be|"
    r"Target application returned an error|Error: process didn't terminate successfully"
)
LOADER = re.compile(r"^.*compute-sanitizer: error while loading .*$", re.MULTILINE)


def why_not(output: str) -> str:
    """Why the tool could not work, by the output of a watched pytest; "" where it could, or where there is a finding.

    What is none of the known complaints is a finding. So are tests that fail beside others that pass; where all fail,
    the GPU is out of reach under the tool, and the parts without it tell more.
    """
    unloaded = LOADER.search(output)
    if unloaded:
        return unloaded.group()
    said = [text for text in SAYS.findall(output) if not BESIDE.match(text)]
    tests = counts_of(output)
    if not said or not all(map(UNABLE.match, said)) or (tests.get("failed") and tests.get("passed")):
        return ""
    return f"compute-sanitizer cannot work here: {'; '.join(dict.fromkeys(said))}"
