//! Who is at which key in this process: duplicates wait here, and not in the
//! database.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use crate::idempotency::{Scope, store::KeyRow};

type Told = watch::Receiver<Option<Arc<KeyRow>>>;

/// The keys that requests of this process are at.
#[derive(Default)]
pub(super) struct InFlight(Mutex<HashMap<Scope, Told>>);

/// What a request is to its key.
pub(super) enum Turn {
    /// The first of this process: it asks the database.
    Lead(Lead),
    /// Another one is there, and will be told.
    Follow(Follow),
}

/// The one that asks the database for a key. When it is dropped without having
/// told anything, the next in line leads.
pub(super) struct Lead {
    all: Arc<InFlight>,
    scope: Scope,
    tell: watch::Sender<Option<Arc<KeyRow>>>,
}

/// One that waits for what the leading request will find.
pub(super) struct Follow(Told);

impl InFlight {
    pub(super) fn enter(self: &Arc<Self>, scope: &Scope) -> Turn {
        match self.keys().entry(scope.clone()) {
            Entry::Occupied(there) => Turn::Follow(Follow(there.get().clone())),
            Entry::Vacant(place) => {
                let (tell, told) = watch::channel(None);
                place.insert(told);
                Turn::Lead(Lead {
                    all: Arc::clone(self),
                    scope: scope.clone(),
                    tell,
                })
            }
        }
    }

    fn keys(&self) -> MutexGuard<'_, HashMap<Scope, Told>> {
        // Every change under this lock is a single insert or remove.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lead {
    /// Tells all that wait what the key's row says, which is committed.
    pub(super) fn tell(self, row: Arc<KeyRow>) {
        self.tell.send_replace(Some(row));
    }
}

impl Drop for Lead {
    /// Before the channel is closed, so that whoever it wakes finds the place free.
    fn drop(&mut self) {
        self.all.keys().remove(&self.scope);
    }
}

impl Follow {
    /// The key's row; `None` if there is none, and it is to be asked for again.
    pub(super) async fn told(mut self) -> Option<Arc<KeyRow>> {
        self.0.wait_for(Option::is_some).await.ok()?.clone()
    }
}
