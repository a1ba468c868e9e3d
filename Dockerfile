FROM rust:1-slim-trixie AS build
WORKDIR /build
COPY . .
# The caches keep dependencies from being compiled again after a change here.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/build/target \
    SQLX_OFFLINE=true cargo build --release --locked --bin payonce \
    && cp target/release/payonce /payonce

FROM debian:trixie-slim
COPY --from=build /payonce /usr/local/bin/payonce
USER 10001:10001
ENV LISTEN_ADDR=0.0.0.0:8080
EXPOSE 8080
ENTRYPOINT ["payonce"]
CMD ["serve"]
