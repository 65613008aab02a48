"""Does a jailbreak suppress latents, amplify others, or both?"""
