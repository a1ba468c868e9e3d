//! Which keys a transaction holds, on whatever replica.
//!
//! Only `pg_locks` says it without taking part: whoever tries the lock, shared or not,
//! can be met by the one who claims the key, and makes them believe that it is in use.
//! But `pg_locks` is always read in whole, which takes 14 ms with 12,000 locks, and
//! for a part of that nobody gets a lock of any kind. So one look answers all who
//! asked before it began, and there is one at a time: what it costs the server does
//! not grow with the number of those who ask.

use std::{
    collections::HashMap,
    mem,
    sync::{Arc, Mutex, PoisonError},
};

use sqlx::PgPool;

use super::Scope;
use crate::db::position;

/// The way to ask. Clones look together.
#[derive(Debug, Clone, Default)]
pub struct HeldKeys {
    asked: Arc<Mutex<Asked>>,
    last: Arc<tokio::sync::Mutex<Option<Look>>>,
}

/// What the next look is to be for.
#[derive(Debug, Default)]
struct Asked {
    look: u64,
    scopes: Vec<Scope>,
}

/// What was seen.
#[derive(Debug)]
struct Look {
    number: u64,
    held: HashMap<Scope, bool>,
}

impl HeldKeys {
    /// Whether a transaction holds the key, at a moment after this was called.
    ///
    /// # Errors
    /// Any database error.
    pub async fn holds(&self, pool: &PgPool, scope: &Scope) -> Result<bool, sqlx::Error> {
        self.holds_by(scope, async |scopes| look(pool, &scopes).await)
            .await
    }

    /// The same; `look` says for each of several keys whether it is held.
    async fn holds_by<E>(
        &self,
        scope: &Scope,
        look: impl AsyncFnOnce(Vec<Scope>) -> Result<HashMap<Scope, bool>, E>,
    ) -> Result<bool, E> {
        let number = {
            let mut asked = self.asked();
            asked.scopes.push(scope.clone());
            asked.look
        };
        let mut last = self.last.lock().await;
        // One that began before, or failed, says nothing of this key.
        let seen = last
            .as_ref()
            .filter(|last| last.number >= number)
            .and_then(|last| last.held.get(scope));
        if let Some(held) = seen {
            return Ok(*held);
        }
        let (number, mut scopes) = {
            let mut asked = self.asked();
            asked.look += 1;
            (asked.look - 1, mem::take(&mut asked.scopes))
        };
        // Not so if it was for a look that failed.
        if !scopes.contains(scope) {
            scopes.push(scope.clone());
        }
        let held = look(scopes).await?;
        let is_held = held.get(scope).copied().unwrap_or_default();
        *last = Some(Look { number, held });
        Ok(is_held)
    }

    fn asked(&self) -> std::sync::MutexGuard<'_, Asked> {
        // A panic in the middle of these few lines leaves nothing half done.
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn look(pool: &PgPool, scopes: &[Scope]) -> Result<HashMap<Scope, bool>, sqlx::Error> {
    let account_ids: Vec<_> = scopes.iter().map(|scope| scope.account_id.0).collect();
    let keys: Vec<_> = scopes.iter().map(|scope| scope.key.as_str()).collect();
    let found = sqlx::query_scalar!(
        r#"
        with held as materialized (
            select classid::bigint << 32 | objid::bigint as id
            from pg_locks
            where locktype = 'advisory' and objsubid = 1
                and database = (select oid from pg_database where datname = current_database())
        )
        select input.position as "position!"
        from unnest($1::uuid[], $2::text[]) with ordinality as input (account_id, key, position)
        where hashtextextended(input.key, uuid_hash_extended(input.account_id, 0))
            in (select id from held)
        "#,
        &account_ids,
        &keys as &[&str],
    )
    .fetch_all(pool)
    .await?;
    let mut held: HashMap<_, _> = scopes.iter().map(|scope| (scope.clone(), false)).collect();
    for ordinality in found {
        held.insert(scopes[position(ordinality)].clone(), true);
    }
    Ok(held)
}

#[cfg(test)]
mod tests {
    use futures::{future::join_all, poll};
    use tokio::sync::oneshot;

    use super::*;
    use crate::{idempotency::Key, ids::AccountId};

    fn scope(key: &str) -> Scope {
        Scope {
            account_id: AccountId(uuid::Uuid::nil()),
            key: Key::from_header(key.as_bytes()).unwrap(),
        }
    }

    /// Says that these are held whose key begins with "held".
    fn seen(scopes: Vec<Scope>) -> HashMap<Scope, bool> {
        let is_held = |scope: &Scope| scope.key.as_str().starts_with("held");
        scopes
            .into_iter()
            .map(|scope| (scope.clone(), is_held(&scope)))
            .collect()
    }

    #[tokio::test]
    async fn one_look_is_for_all_who_asked_before_it_began_and_for_no_others() {
        let keys = HeldKeys::default();
        let (end, ended) = oneshot::channel::<()>();
        let first = scope("held_1");
        let mut running = Box::pin(keys.holds_by(&first, async |scopes| {
            assert_eq!(scopes.len(), 1);
            ended.await.unwrap();
            Ok::<_, ()>(seen(scopes))
        }));
        assert!(poll!(&mut running).is_pending());
        let looks = std::cell::Cell::new(0);
        let scopes = ["held_1", "held_2", "free_1", "free_2", "free_2"].map(scope);
        let mut others = Box::pin(join_all(scopes.iter().map(|scope| {
            keys.holds_by(scope, async |scopes| {
                looks.set(looks.get() + 1);
                assert_eq!(scopes.len(), 5);
                Ok::<_, ()>(seen(scopes))
            })
        })));
        assert!(poll!(&mut others).is_pending());
        end.send(()).unwrap();
        assert_eq!(running.await, Ok(true));
        let others: Vec<_> = others.await.into_iter().map(Result::unwrap).collect();
        assert_eq!(others, [true, true, false, false, false]);
        assert_eq!(looks.get(), 1);
    }

    #[tokio::test]
    async fn a_look_that_fails_is_made_again_by_those_who_waited_for_it() {
        let keys = HeldKeys::default();
        let (held, free) = (scope("held_1"), scope("free_1"));
        let (end, ended) = oneshot::channel::<()>();
        let mut running = Box::pin(keys.holds_by(&free, async |_| {
            ended.await.unwrap();
            Ok::<_, ()>(HashMap::new())
        }));
        assert!(poll!(&mut running).is_pending());
        let mut failing = Box::pin(keys.holds_by(&free, async |_| Err("it failed")));
        let mut waiting =
            Box::pin(keys.holds_by(&held, async |scopes| Ok::<_, &str>(seen(scopes))));
        assert!(poll!(&mut failing).is_pending());
        assert!(poll!(&mut waiting).is_pending());
        end.send(()).unwrap();
        assert_eq!(running.await, Ok(false));
        assert_eq!(failing.await, Err("it failed"));
        let later = scope("free_2");
        let mut later = Box::pin(keys.holds_by(&later, async |scopes| Ok::<_, &str>(seen(scopes))));
        assert!(poll!(&mut later).is_pending());
        assert_eq!(waiting.await, Ok(true));
        assert_eq!(later.await, Ok(false));
    }
}
