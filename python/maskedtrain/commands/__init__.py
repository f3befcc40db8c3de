"""The commands of ``maskedtrain``: every module here with ``main(arguments, console)`` is one."""
