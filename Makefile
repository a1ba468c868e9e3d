.DEFAULT_GOAL := help
.PHONY: help run test chaos check fmt prepare bench stop clean-dev

# PostgreSQL is looked for in this order: DATABASE_URL, docker, programs on this
# machine, its package manager, a PyPI wheel; see scripts/postgres.

help: ## list the tasks
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'
	@echo
	@echo 'DATABASE_URL=... names the PostgreSQL to use. Without it, one is found or started;'
	@echo 'POSTGRES_WAY=docker|programs|packages|wheel allows one way of doing so only.'

run: ## serve on a database that is found or started, with a demo account
	@scripts/run

test: ## run every test (ARGS='...' goes to cargo test)
	@scripts/test $(ARGS)

chaos: ## the chaos suite in its long form: CHAOS_MINUTES=30, optimised build
	@CHAOS_MINUTES=$${CHAOS_MINUTES:-30} scripts/test --release --test chaos -- $(ARGS)

check: ## formatting, lints, .sqlx/, docs/openapi.json, licences and banned crates
	cargo fmt --check
	cargo clippy --all-targets --locked -- -D warnings
	scripts/prepare --check
	scripts/openapi --check
	.dev/tools/bin/cargo-deny --locked check licenses bans

fmt: ## format the code
	cargo fmt

prepare: ## write .sqlx/ and docs/openapi.json anew, after a query, a migration or the API has changed
	scripts/prepare
	scripts/openapi

bench: ## measure throughput and latency (ARGS='...' goes to scripts/bench)
	@scripts/bench $(ARGS)

stop: ## stop the PostgreSQL that was started here
	@scripts/postgres stop

clean-dev: ## the same, and remove its data, the demo key and the tools (.dev/)
	@scripts/postgres clean
	rm -rf .dev
