//! Lists, as Stripe's clients ask for them and page through them.

use std::{fmt::Display, str::FromStr, time::Duration};

use axum::{http::StatusCode, response::Response};
use serde::Serialize;
use uuid::Uuid;

use super::{
    json,
    params::{Nested, Params, not_allowed},
    request_context::DEADLINE,
};
use crate::{
    db::CONNECT_TIMEOUT,
    error::{BadParameter, Error},
    ids::first_of,
    pagination::{Cursor, Page},
    writer::ATTEMPT_TIMEOUT,
};

/// The longest page.
pub(super) const LIMIT_MAX: i64 = 100;
/// Of a page, where the request does not say.
pub(super) const LIMIT_DEFAULT: i64 = 10;

/// The last second of the year 9999.
pub(super) const SECOND_MAX: i64 = 253_402_300_799;

/// How far a client that polls lists has to look back behind the newest one that it
/// has seen. Ids, and `created` with them, are given out before the transaction, so
/// what is committed late appears between what was read before.
///
/// A request lives for [`DEADLINE`]. Just before, a last attempt may begin: it
/// connects, and runs. If the process stands still in its middle, the server waits
/// for [`IDLE_TIMEOUT`] before it ends the transaction. That makes 21 seconds to the
/// COMMIT. The rest is for the COMMIT itself, and for replicas whose clocks differ.
/// A COMMIT that waits for a synchronous standby has no limit, and a list that shows
/// its charge comes as late.
pub(super) const POLLING_OVERLAP: Duration = Duration::from_mins(1);

/// The sessions' `idle_in_transaction_session_timeout`.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

const _: () = assert!(
    2 * (DEADLINE.as_secs()
        + CONNECT_TIMEOUT.as_secs()
        + ATTEMPT_TIMEOUT.as_secs()
        + IDLE_TIMEOUT.as_secs())
        <= POLLING_OVERLAP.as_secs(),
    "half of the overlap has to be enough for a request that commits as late as it can"
);

/// What a request for a list asks for, before its cursor was looked up.
pub(super) struct ListQuery<Id> {
    limit: i64,
    cursor: Option<(&'static str, Result<Id, ()>)>,
    oldest: Option<Uuid>,
    newest: Option<Uuid>,
}

impl<Id: FromStr + Copy + Display> ListQuery<Id> {
    /// `limit`, `starting_after` or `ending_before`, and `created`, a second or
    /// its bounds (`created[gte]` and the like).
    pub(super) fn take(params: &mut Params) -> Result<Self, BadParameter> {
        let limit = params
            .integer("limit", 1, LIMIT_MAX)?
            .unwrap_or(LIMIT_DEFAULT);
        let mut cursor = None;
        for name in ["starting_after", "ending_before"] {
            if let Some(id) = params.text(name, 255)? {
                if cursor.is_some() {
                    return Err(not_allowed(name, "cannot be combined with starting_after."));
                }
                cursor = Some((name, id.parse().map_err(|_| ())));
            }
        }
        let (oldest, newest) = created(params)?;
        Ok(Self {
            limit,
            cursor,
            oldest,
            newest,
        })
    }

    /// The page; `look_up` says where the cursor is, if it is there at all.
    pub(super) async fn page(
        self,
        look_up: impl AsyncFnOnce(Id) -> Result<Option<Uuid>, Error>,
    ) -> Result<Page, Error> {
        let from = match self.cursor {
            None => Cursor::Newest,
            Some((name, id)) => {
                let missing = Error::ResourceMissing { param: Some(name) };
                let id = id.map_err(|()| missing.clone())?;
                let at = look_up(id).await?.ok_or(missing)?;
                if name == "starting_after" {
                    Cursor::After(at)
                } else {
                    Cursor::Before(at)
                }
            }
        };
        Ok(Page {
            limit: self.limit,
            from,
            oldest: self.oldest,
            newest: self.newest,
        })
    }
}

/// The ids between which everything was made that `created` asks for. Ids carry
/// the time of what they name, so a bound on time is one on ids.
fn created(params: &mut Params) -> Result<(Option<Uuid>, Option<Uuid>), BadParameter> {
    let first = |second: i64| first_of(second.cast_unsigned());
    let mut inner = match params.nested("created")? {
        None => return Ok((None, None)),
        Some(Nested::Value(mut value)) => {
            let second = value.integer("created", 0, SECOND_MAX)?;
            return Ok((second.map(first), second.map(|second| first(second + 1))));
        }
        Some(Nested::Map(inner)) => inner,
    };
    let (mut oldest, mut newest) = (None, None);
    for (name, is_lower, shift) in [
        ("created[gte]", true, 0),
        ("created[gt]", true, 1),
        ("created[lte]", false, 1),
        ("created[lt]", false, 0),
    ] {
        let Some(second) = inner.integer(name, 0, SECOND_MAX)? else {
            continue;
        };
        let bound = Some(first(second + shift));
        if is_lower {
            oldest = oldest.max(bound);
        } else {
            newest = [newest, bound].into_iter().flatten().min();
        }
    }
    inner.finish()?;
    Ok((oldest, newest))
}

/// Stripe's list object; the SDKs page by its `url`.
#[derive(Serialize)]
struct List<T> {
    object: &'static str,
    url: &'static str,
    has_more: bool,
    data: Vec<T>,
}

pub(super) fn list_of<T: Serialize>(
    url: &'static str,
    has_more: bool,
    data: impl Iterator<Item = T>,
) -> Response {
    let list = List {
        object: "list",
        url,
        has_more,
        data: data.collect(),
    };
    let body = serde_json::to_string(&list).expect("a list of plain data is always JSON");
    json(StatusCode::OK, body)
}
