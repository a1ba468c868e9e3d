//! Accounts and their API keys, and the SQL of their tables.

use std::{fmt, str::FromStr};

use chrono::{DateTime, Utc};
use rand::distr::{Alphanumeric, SampleString};
use sha2::{Digest, Sha256};
use sqlx::{PgConnection, PgExecutor};

use crate::ids::{AccountId, ApiKeyId};

const PREFIX: &str = "sk_test_";
const SECRET_LEN: usize = 32;
const SECRET_LEN_MIN: usize = 24;
const SECRET_LEN_MAX: usize = 128;

/// The longest name of an account, in characters.
pub const NAME_MAX: usize = 200;

/// A secret that speaks for an account: `sk_test_` and at least 24 letters or
/// digits, the form that Stripe's tools insist on.
#[derive(Clone)]
pub struct ApiKey(String);

/// What is stored of an API key, and what it is looked up by.
pub type SecretHash = [u8; 32];

impl ApiKey {
    /// A new one, with 190 bits from the operating system's generator.
    #[must_use]
    pub fn generate() -> Self {
        Self(format!(
            "{PREFIX}{}",
            Alphanumeric.sample_string(&mut rand::rng(), SECRET_LEN)
        ))
    }

    /// Its SHA-256. A fast hash is right here: the secret is random and long,
    /// so there is nothing to guess.
    #[must_use]
    pub fn hash(&self) -> SecretHash {
        Sha256::digest(&self.0).into()
    }

    /// The secret itself, to be shown once.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

/// A text that does not have the form of an API key. Does not repeat it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "an API key is {PREFIX} followed by {SECRET_LEN_MIN} to {SECRET_LEN_MAX} letters or digits"
)]
pub struct MalformedApiKey;

impl FromStr for ApiKey {
    type Err = MalformedApiKey;

    fn from_str(text: &str) -> Result<Self, MalformedApiKey> {
        let secret = text.strip_prefix(PREFIX).ok_or(MalformedApiKey)?;
        let well_formed = (SECRET_LEN_MIN..=SECRET_LEN_MAX).contains(&secret.len())
            && secret.bytes().all(|b| b.is_ascii_alphanumeric());
        well_formed
            .then(|| Self(text.to_owned()))
            .ok_or(MalformedApiKey)
    }
}

/// An API key as it is listed: without the secret, which nobody has.
#[derive(Debug)]
pub struct ApiKeyRow {
    /// Its public name.
    pub api_key_id: ApiKeyId,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// Since when it is dead.
    pub revoked_at: Option<DateTime<Utc>>,
}

/// Makes an account.
///
/// # Errors
/// Any database error.
pub async fn create(conn: &mut PgConnection, name: &str) -> Result<AccountId, sqlx::Error> {
    let account_id = AccountId::new();
    sqlx::query!(
        "insert into accounts (account_id, name) values ($1, $2)",
        account_id.0,
        name
    )
    .execute(conn)
    .await?;
    Ok(account_id)
}

/// Whether there is any account.
///
/// # Errors
/// Any database error.
pub async fn exist(executor: impl PgExecutor<'_>) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar!(r#"select exists (select from accounts) as "exist!""#)
        .fetch_one(executor)
        .await
}

/// Makes an API key for an account; `None` if there is no such account.
///
/// # Errors
/// Any database error.
pub async fn create_api_key(
    conn: &mut PgConnection,
    account_id: AccountId,
) -> Result<Option<(ApiKeyId, ApiKey)>, sqlx::Error> {
    let (api_key_id, api_key) = (ApiKeyId::new(), ApiKey::generate());
    let done = sqlx::query!(
        "insert into api_keys (account_id, api_key_id, secret_hash)
         select account_id, $2, $3 from accounts where account_id = $1",
        account_id.0,
        api_key_id.0,
        &api_key.hash(),
    )
    .execute(conn)
    .await?;
    Ok((done.rows_affected() == 1).then_some((api_key_id, api_key)))
}

/// An account's API keys, oldest first; `None` if there is no such account.
///
/// # Errors
/// Any database error.
pub async fn list_api_keys(
    conn: &mut PgConnection,
    account_id: AccountId,
) -> Result<Option<Vec<ApiKeyRow>>, sqlx::Error> {
    let known = sqlx::query_scalar!(
        r#"select exists (select from accounts where account_id = $1) as "known!""#,
        account_id.0
    )
    .fetch_one(&mut *conn)
    .await?;
    if !known {
        return Ok(None);
    }
    let rows = sqlx::query!(
        "select api_key_id, created_at, revoked_at from api_keys
         where account_id = $1 order by api_key_id",
        account_id.0
    )
    .fetch_all(conn)
    .await?;
    let rows = rows.into_iter().map(|row| ApiKeyRow {
        api_key_id: ApiKeyId(row.api_key_id),
        created_at: row.created_at,
        revoked_at: row.revoked_at,
    });
    Ok(Some(rows.collect()))
}

/// Revokes an API key, once: a second time changes nothing. `false` if there
/// is no such key. It is dead on every replica within five seconds.
///
/// # Errors
/// Any database error.
pub async fn revoke_api_key(
    conn: &mut PgConnection,
    api_key_id: ApiKeyId,
) -> Result<bool, sqlx::Error> {
    let done = sqlx::query!(
        "update api_keys set revoked_at = coalesce(revoked_at, statement_timestamp())
         where api_key_id = $1",
        api_key_id.0
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Whose API key this is; `None` if it is unknown or revoked.
///
/// # Errors
/// Any database error.
pub async fn authenticate(
    executor: impl PgExecutor<'_>,
    secret_hash: SecretHash,
) -> Result<Option<AccountId>, sqlx::Error> {
    let account_id = sqlx::query_scalar!(
        "select account_id from api_keys where secret_hash = $1 and revoked_at is null",
        &secret_hash
    )
    .fetch_optional(executor)
    .await?;
    Ok(account_id.map(AccountId))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_api_key_has_the_form_that_stripes_tools_take() {
        let made = ApiKey::generate();
        assert!(made.reveal().parse::<ApiKey>().is_ok());
        assert_ne!(made.hash(), ApiKey::generate().hash());
        let letters = "a".repeat(SECRET_LEN_MIN);
        for wrong in [
            String::new(),
            letters.clone(),
            format!("sk_live_{letters}"),
            format!("sk_test_{}", &letters[1..]),
            format!("sk_test_{letters}-"),
            format!("sk_test_{}", "a".repeat(SECRET_LEN_MAX + 1)),
        ] {
            assert!(wrong.parse::<ApiKey>().is_err(), "{wrong:?} was taken");
        }
    }

    #[test]
    fn an_api_key_does_not_reach_a_log() {
        let key = ApiKey::generate();
        assert!(!format!("{key:?}").contains(key.reveal()));
    }
}
