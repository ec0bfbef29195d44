"""The one exception that users meet: a sentence that says what is wrong, where, and what to do."""


class AutotpError(Exception):
    """Wrong input or an impossible request, explained in one sentence.

    The command line prints the message alone and exits with code 2; a library caller may catch it.
    """
