"""Around the other parts: configuration, checkpoint, controller, gateway, Ray actors, command line."""

from cluster.environment import prepare

prepare()
