"""Networks as published that no user needs: what goldens hold the blocks of the package to."""
