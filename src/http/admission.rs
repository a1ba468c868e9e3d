//! Admission control for reads: how many use the connections of a pool at once,
//! and how many wait for one.
//!
//! A pool's own queue has no bound but its time-out. When it gets longer than that,
//! everybody gives up just before it is their turn and starts again from the end,
//! and hardly a read succeeds any more. Here whoever waits for a read keeps their place
//! until the deadline of their request, the time of an attempt begins when there is a
//! connection for it, and whoever finds no place to wait is told so at once.

use std::sync::Arc;

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};

use crate::error::{Error, Unavailable};

/// How many may wait for each connection. A read that takes 30 ms, which is a long
/// one, then waits a second.
const WAITING_PER_CONNECTION: usize = 32;

/// The queue for the connections of a pool. Clones are the same queue.
#[derive(Debug, Clone)]
pub struct Admission {
    running: Arc<Semaphore>,
    admitted: Arc<Semaphore>,
}

/// The right to use one connection, until it is dropped.
#[derive(Debug)]
pub struct Turn {
    _running: OwnedSemaphorePermit,
    _admitted: OwnedSemaphorePermit,
}

impl Admission {
    /// A queue for so many connections.
    #[must_use]
    pub fn new(connections: u32) -> Self {
        Self::with_places(connections, connections as usize * WAITING_PER_CONNECTION)
    }

    /// The same, where so many may wait in all.
    #[must_use]
    pub fn with_places(connections: u32, waiting: usize) -> Self {
        let connections = connections as usize;
        Self {
            running: Arc::new(Semaphore::new(connections)),
            admitted: Arc::new(Semaphore::new(connections + waiting)),
        }
    }

    /// Waits for a connection to be free, in the order of arrival. Does not use the
    /// pool.
    ///
    /// # Errors
    /// [`Error::Unavailable`], at once if too many wait already, and otherwise at
    /// `deadline`.
    pub async fn turn(&self, deadline: Instant) -> Result<Turn, Error> {
        let admitted = Arc::clone(&self.admitted)
            .try_acquire_owned()
            .map_err(|_| Error::Unavailable(Unavailable::ReadsFull))?;
        let running = Arc::clone(&self.running).acquire_owned();
        match timeout_at(deadline, running).await {
            Ok(Ok(running)) => Ok(Turn {
                _running: running,
                _admitted: admitted,
            }),
            // Neither semaphore is ever closed.
            Ok(Err(_)) | Err(_) => Err(Error::Unavailable(Unavailable::Database)),
        }
    }
}
