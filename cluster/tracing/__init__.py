"""One trace of a request through all processes, over OTLP. Only here is OpenTelemetry known.

`settings`: the configuration's part.  `contexts`: the place in a trace, on its way between processes.  `dispatch`: sums
of a step's crossings.  `products`: sums of a shard's work for a step. These load no OpenTelemetry, which is an optional
package: a process whose configuration asks for traces loads it with the rest, `spans` and what needs it.

A request has a span in its ingress, its attention replica and its engine, and there one for each phase. Steps are many:
1,000 tokens over 24 layers and 4 shards are 96,000 crossings. So a request has spans of some of its steps only
(`engine.in_detail`), and each of these has two for each shard that got rows, with the sums over all layers.
"""
