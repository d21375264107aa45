"""The name by which ingresses of version 0.1 start `cluster.serving.text.worker`.

One that runs on while a newer package is installed finds its worker here.
"""

from cluster.serving.text.worker import main

if __name__ == "__main__":
    main()
