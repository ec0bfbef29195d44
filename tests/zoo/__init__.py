"""Tiny random models of many architectures, each traced, planned with splitting forced, and compared with one device."""
