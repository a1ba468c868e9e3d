//! A page of a list, as Stripe's clients ask for it.

use sqlx::types::Uuid;

/// Which part of a list, newest first; ids are in the order of time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// How many, from 1.
    pub limit: i64,
    /// From where.
    pub from: Cursor,
    /// Only what has an id of at least this.
    pub oldest: Option<Uuid>,
    /// Only what has an id below this.
    pub newest: Option<Uuid>,
}

/// From where a page goes, and in which direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cursor {
    /// From the newest on.
    Newest,
    /// From the one that follows this, to the older ones.
    After(Uuid),
    /// Up to the one that precedes this, from the newer ones.
    Before(Uuid),
}

impl Page {
    /// Ids have to lie strictly between these two.
    #[must_use]
    pub fn bounds(&self) -> (Uuid, Uuid) {
        let oldest = self.oldest.map_or(Uuid::nil(), |id| {
            Uuid::from_u128(id.as_u128().saturating_sub(1))
        });
        let newest = self.newest.unwrap_or(Uuid::max());
        match self.from {
            Cursor::Newest => (oldest, newest),
            Cursor::After(id) => (oldest, newest.min(id)),
            Cursor::Before(id) => (oldest.max(id), newest),
        }
    }

    /// Whether the rows are to be read from the oldest on, and turned round.
    #[must_use]
    pub fn backwards(&self) -> bool {
        matches!(self.from, Cursor::Before(_))
    }

    /// One more than asked for, which tells whether there are more.
    #[must_use]
    pub fn rows(&self) -> i64 {
        self.limit + 1
    }

    /// The page, from the rows that were read, and whether there are more in its
    /// direction.
    #[must_use]
    pub fn of<T>(&self, mut rows: Vec<T>) -> (Vec<T>, bool) {
        let asked = usize::try_from(self.limit).unwrap_or(usize::MAX);
        let has_more = rows.len() > asked;
        rows.truncate(asked);
        if self.backwards() {
            rows.reverse();
        }
        (rows, has_more)
    }
}
