"""Do facts of two hops compose, and if not, why?"""
