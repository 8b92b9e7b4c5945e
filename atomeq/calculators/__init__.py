"""Doors to codes that move atoms themselves: ASE, torch-sim, i-PI.

Units, signs and Voigt order are converted here and nowhere else. What is computed with a calculator
is in properties/, what moves atoms without one in dynamics/.
"""
