FROM rust:1-slim-trixie AS build
WORKDIR /build
# The dependencies first, with nothing of ours: their layer is good until
# Cargo.lock changes. Cache mounts would do the same, but only with BuildKit.
COPY Cargo.toml Cargo.lock ./
RUN mkdir src \
    && echo 'fn main() {}' >src/main.rs \
    && touch src/lib.rs \
    && cargo build --release --locked --bin payonce
COPY .cargo .cargo
COPY .sqlx .sqlx
COPY migrations migrations
COPY src src
# Newer than what was built above, whatever their times are outside.
RUN touch src/main.rs src/lib.rs \
    && cargo build --release --locked --bin payonce

FROM debian:trixie-slim
COPY --from=build /build/target/release/payonce /usr/local/bin/payonce
USER 10001:10001
ENV LISTEN_ADDR=0.0.0.0:8080
EXPOSE 8080
ENTRYPOINT ["payonce"]
CMD ["serve"]
