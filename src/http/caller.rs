//! Who asks: from an API key to an account.

use std::time::Duration;

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, header, request::Parts},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use moka::future::Cache;
use sqlx::PgPool;
use tokio::time::Instant;

use super::{App, exchange::Exchange};
use crate::{
    accounts::{self, ApiKey, SecretHash},
    db,
    error::Error,
    ids::AccountId,
};

/// How long an account is remembered. A look-up takes a second at most
/// ([`db::READ_TIMEOUT`]), so a revoked key is dead within five.
const REMEMBERED: Duration = Duration::from_secs(4);

/// How many are remembered; one takes about 150 bytes.
const REMEMBERED_MAX: u64 = 10_000;

/// Somebody who is known.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    /// On whose behalf.
    pub account_id: AccountId,
}

/// Finds out whose an API key is, and remembers it for a few seconds, so that a
/// busy key costs no query per request. Requests that ask for the same key at
/// the same time share one query. Unknown keys are not remembered: a key that
/// was just made works at once.
#[derive(Debug, Clone)]
pub struct Callers {
    pool: PgPool,
    remembered: Cache<SecretHash, AccountId>,
}

impl Callers {
    /// Looks keys up in `pool`.
    #[must_use]
    pub fn new(pool: PgPool) -> Self {
        let remembered = Cache::builder()
            .max_capacity(REMEMBERED_MAX)
            .time_to_live(REMEMBERED)
            .build();
        Self { pool, remembered }
    }

    /// Each request asks on its own clock; what they share is an attempt.
    async fn identify(&self, key: &ApiKey, deadline: Instant) -> Result<AccountId, Error> {
        let hash = key.hash();
        let look_up = || async {
            let known = accounts::authenticate(&self.pool, hash).await?;
            known.ok_or(sqlx::Error::RowNotFound)
        };
        let attempt = || async {
            match self.remembered.try_get_with(hash, look_up()).await {
                Ok(account_id) => Ok(Some(account_id)),
                Err(error) if matches!(*error, sqlx::Error::RowNotFound) => Ok(None),
                Err(error) => Err(error),
            }
        };
        db::read(deadline, attempt)
            .await?
            .ok_or(Error::ApiKeyInvalid)
    }
}

impl FromRequestParts<App> for Caller {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        let Ok(Exchange { deadline, .. }) = Exchange::from_request_parts(parts, app).await;
        let key = api_key(&parts.headers).ok_or(Error::ApiKeyInvalid)?;
        let account_id = app.callers.identify(&key, deadline).await?;
        // Before anything is read of the request or claimed for it.
        app.limits.count(account_id)?;
        Ok(Self { account_id })
    }
}

/// From `Bearer KEY`, or from the user name of `Basic` with any password, as
/// `curl -u KEY:` sends it.
fn api_key(headers: &HeaderMap) -> Option<ApiKey> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return None;
    };
    let (scheme, credentials) = value.to_str().ok()?.trim().split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return credentials.trim().parse().ok();
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = String::from_utf8(STANDARD.decode(credentials.trim()).ok()?).ok()?;
    decoded
        .split_once(':')
        .map_or(decoded.as_str(), |(user, _)| user)
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bearer_and_basic_name_the_same_key() {
        let key = ApiKey::generate();
        let of = |value: String| {
            let headers = HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
            api_key(&headers).map(|key| key.hash())
        };
        let secret = key.reveal();
        assert_eq!(of(format!("Bearer {secret}")), Some(key.hash()));
        assert_eq!(of(format!("bearer  {secret}")), Some(key.hash()));
        assert_eq!(
            of(format!("Basic {}", STANDARD.encode(format!("{secret}:")))),
            Some(key.hash())
        );
        assert_eq!(
            of(format!("Basic {}", STANDARD.encode(secret))),
            Some(key.hash())
        );
        for wrong in [
            secret.to_owned(),
            format!("Digest {secret}"),
            "Basic ???".to_owned(),
            "Bearer".to_owned(),
        ] {
            assert_eq!(of(wrong), None);
        }
    }
}
