"""Helm 4 in a process of its own: requests as JSON lines in, answers as JSON lines out.

So Go's runtime and signal handlers, which its library brings, stay out of the tests' process.
"""

import json
import sys

import helm_python as helm


def answer(request):
    if request["lint"]:
        return helm.lint(request["chart"], request["values"], strict=True)
    with helm.Chart.load(request["chart"]) as chart:
        return chart.render(request["values"], name=request["name"], namespace="serving")


for line in sys.stdin:
    try:
        reply = {"result": answer(json.loads(line))}
    except helm.HelmError as error:
        reply = {"error": str(error)}
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()
