"""How much hardware a load needs: what a step costs, requests that arrive, a cluster that answers them in virtual time.

Knows no tensors, no Ray and no clock. `costs` says what a step takes and `sharing` how long it takes among others;
`simulation` makes the steps; `search` tries clusters until one keeps its promises.
"""
