//! One pass over headers and bytes: what a POST asks for, under which key.

use std::time::Duration;

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Request},
    http::{HeaderMap, HeaderValue, header},
};
use http_body_util::LengthLimitError;
use tokio::time::{Instant, timeout_at};

use super::{App, Keyless, caller::Caller, params::Params, request_context::RequestContext};
use crate::{
    error::{BadParameter, Error, ParameterCode, Unavailable},
    idempotency::{FieldDigests, Fingerprint, Fingerprinted, Key, Rule, Scenario, Scope},
};

/// The largest body, in bytes.
pub const BODY_MAX: usize = 64 * 1024;

/// The longest time that `Prefer: wait=N` can ask for.
pub const WAIT_MAX: Duration = Duration::from_secs(10);

/// A typed request, as it stands in the body of a POST.
pub trait FromParams: Fingerprinted + Sized {
    /// Takes the parameters it knows.
    ///
    /// # Errors
    /// The first parameter that is wrong.
    fn from_params(params: &mut Params) -> Result<Self, BadParameter>;
}

/// What somebody who is known asks for, under a key of theirs.
#[derive(Debug)]
pub struct Command<T> {
    /// Whose key, and which.
    pub scope: Scope,
    /// Of method, path and request.
    pub fingerprint: Fingerprint,
    /// Of its fields.
    pub digests: FieldDigests,
    /// How long the key is kept, and what a duplicate gets.
    pub rule: Rule,
    /// Whether the key came with the request, or was made of its content.
    pub keyed: bool,
    /// What is asked for.
    pub request: T,
    /// How long to wait if the key is in use.
    pub wait: Duration,
    /// In which it was asked for.
    pub context: RequestContext,
}

impl<T> Command<T> {
    /// What is asked for, and all that is around it.
    pub fn split(self) -> (Command<()>, T) {
        let around = Command {
            scope: self.scope,
            fingerprint: self.fingerprint,
            digests: self.digests,
            rule: self.rule,
            keyed: self.keyed,
            request: (),
            wait: self.wait,
            context: self.context,
        };
        (around, self.request)
    }
}

impl<T: FromParams> FromRequest<App> for Command<T> {
    type Rejection = Error;

    /// In this order, so that a stranger learns nothing: who asks, which media
    /// type, which key, what.
    async fn from_request(request: Request, app: &App) -> Result<Self, Error> {
        let (mut parts, body) = request.into_parts();
        let Ok(context) = RequestContext::from_request_parts(&mut parts, app).await;
        Caller::from_request_parts(&mut parts, app).await?;
        let media_type = MediaType::of(&parts.headers)?;
        let key = idempotency_key(&parts.headers)?;
        if key.is_none() && app.keyless == Keyless::Refuse {
            return Err(Error::KeyMissing);
        }
        if let Some(query) = parts.uri.query() {
            Params::from_form(query.as_bytes())?.finish()?;
        }
        let body = read_body(&parts.headers, body, BODY_MAX, context.deadline).await?;
        // Again, since the body may have taken its time: an API key that was revoked
        // meanwhile charges nobody. Costs a query only if it did.
        let Caller { account_id } = Caller::identify(&mut parts, app).await?;
        let mut params = match media_type {
            Some(MediaType::Json) => Params::from_json(&body)?,
            Some(MediaType::Form) => Params::from_form(&body)?,
            None if body.is_empty() => Params::from_form(b"")?,
            None => return Err(Error::MediaTypeUnsupported),
        };
        let typed = T::from_params(&mut params)?;
        params.finish()?;
        let (method, path) = (parts.method.as_str(), parts.uri.path());
        let fingerprint = Fingerprint::new(method, path, &typed);
        let keyed = key.is_some();
        let key = key.unwrap_or_else(|| {
            let request = Fingerprint::version_1(method, path, &typed);
            Key::internal("keyless", request.as_bytes())
        });
        let scenario = if keyed {
            Scenario::Payment
        } else {
            Scenario::Keyless
        };
        Ok(Self {
            digests: FieldDigests::new(method, path, &typed),
            fingerprint,
            scope: Scope { account_id, key },
            rule: app.rules.of(scenario),
            keyed,
            request: typed,
            wait: preferred_wait(&parts.headers).unwrap_or(app.wait),
            context,
        })
    }
}

enum MediaType {
    Json,
    Form,
}

impl MediaType {
    /// `None` if the request does not say, which is fine if it has no body.
    fn of(headers: &HeaderMap) -> Result<Option<Self>, Error> {
        let encoding = only(headers, &header::CONTENT_ENCODING, "Content-Encoding")?
            .map(|value| value.as_bytes().trim_ascii());
        if encoding.is_some_and(|encoding| !encoding.eq_ignore_ascii_case(b"identity")) {
            return Err(Error::MediaTypeUnsupported);
        }
        let Some(value) = only(headers, &header::CONTENT_TYPE, "Content-Type")? else {
            return Ok(None);
        };
        let value = value
            .to_str()
            .map_err(|_| Error::MediaTypeUnsupported)?
            .to_ascii_lowercase();
        let (essence, parameters) = value.split_once(';').unwrap_or((&value, ""));
        for parameter in parameters.split(';').map(str::trim) {
            if let Some(charset) = parameter.strip_prefix("charset=")
                && charset.trim_matches('"') != "utf-8"
            {
                return Err(Error::MediaTypeUnsupported);
            }
        }
        match essence.trim() {
            "application/json" => Ok(Some(Self::Json)),
            "application/x-www-form-urlencoded" => Ok(Some(Self::Form)),
            _ => Err(Error::MediaTypeUnsupported),
        }
    }
}

/// The header of this name, of which there may be one: to follow the first of two
/// is a guess, and what stands before us may follow the other.
fn only<'a>(
    headers: &'a HeaderMap,
    header: &header::HeaderName,
    name: &str,
) -> Result<Option<&'a HeaderValue>, Error> {
    let mut values = headers.get_all(header).iter();
    let value = values.next();
    if values.next().is_some() {
        return Err(Error::Parameter(BadParameter {
            code: ParameterCode::Repeated,
            param: Some(name.to_owned()),
            message: format!("{name} was sent more than once."),
        }));
    }
    Ok(value)
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<Key>, Error> {
    Key::from_headers(
        headers
            .get_all("idempotency-key")
            .iter()
            .map(HeaderValue::as_bytes),
    )
    .map_err(Error::KeyInvalid)
}

/// The whole body, or an error at the deadline: one that never ends would keep
/// its connection, and a shutdown, waiting.
pub(crate) async fn read_body(
    headers: &HeaderMap,
    body: axum::body::Body,
    max: usize,
    deadline: Instant,
) -> Result<Bytes, Error> {
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > max) {
        return Err(Error::BodyTooLarge(max));
    }
    match timeout_at(deadline, axum::body::to_bytes(body, max)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if is_too_long(&error) => Err(Error::BodyTooLarge(max)),
        Ok(Err(_)) => Err(Error::Parameter(BadParameter {
            code: ParameterCode::Unreadable,
            param: None,
            message: "The body ended in the middle, or is broken.".to_owned(),
        })),
        Err(_) => Err(Error::Unavailable(Unavailable::BodyLate)),
    }
}

fn is_too_long(error: &axum::Error) -> bool {
    std::error::Error::source(error).is_some_and(<dyn std::error::Error>::is::<LengthLimitError>)
}

/// RFC 7240's `Prefer: wait=N`, in seconds. A preference that is not understood
/// is to be ignored.
fn preferred_wait(headers: &HeaderMap) -> Option<Duration> {
    headers
        .get_all("prefer")
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|preference| preference.split(';').next())
        .find_map(|preference| {
            let (name, value) = preference.split_once('=')?;
            let seconds = value.trim().trim_matches('"').parse().ok()?;
            name.trim().eq_ignore_ascii_case("wait").then_some(seconds)
        })
        .map(|seconds| Duration::from_secs(seconds).min(WAIT_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preference_is_obeyed_up_to_ten_seconds() {
        let wait = |value: &'static str| {
            let headers = HeaderMap::from_iter([(
                header::HeaderName::from_static("prefer"),
                value.parse().unwrap(),
            )]);
            preferred_wait(&headers).map(|wait| wait.as_secs())
        };
        assert_eq!(wait("wait=5"), Some(5));
        assert_eq!(wait("respond-async, wait=0"), Some(0));
        assert_eq!(wait("Wait = 3; foo=1"), Some(3));
        assert_eq!(wait("wait=86400"), Some(10));
        for ignored in ["wait", "wait=", "wait=soon", "wait=-1", "respond-async"] {
            assert_eq!(wait(ignored), None, "{ignored}");
        }
    }
}
