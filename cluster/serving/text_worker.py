"""Where ingresses of version 0.1 look for `cluster.serving.text.worker`.

An ingress that runs on when a newer package is installed starts this process by its name.
"""

from cluster.serving.text.worker import main

if __name__ == "__main__":
    main()
