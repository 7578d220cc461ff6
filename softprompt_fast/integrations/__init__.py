# SPDX-License-Identifier: Apache-2.0
"""Meeting points with other libraries: every version test of a third party lives in this package."""
