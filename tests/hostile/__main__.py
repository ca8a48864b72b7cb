from tests.hostile.running import main

main()
