//! `DATABASE_URL`: what it may be, and what is wrong with one that cannot be used.

use std::str::FromStr;

use sqlx::postgres::PgConnectOptions;

use super::describe;

/// Why a URL leads to no database. Repeats nothing of it that could be a password.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// No URL at all.
    #[error("it has to be a URL like postgres://user:password@127.0.0.1:5432/payonce")]
    NotAUrl,
    /// That of another database.
    #[error("payonce needs PostgreSQL: the URL has to begin with postgres://, not {0}://")]
    OtherScheme(String),
    /// A character of user or password ends them too early.
    #[error(
        "an @, /, ?, # or % in the user name or the password has to be percent-encoded: %40, %2F, %3F, %23, %25"
    )]
    NotEncoded,
    /// No port.
    #[error(
        "the port has to be a number from 1 to 65535; and an @, /, ? or # in the password has to be percent-encoded: %40, %2F, %3F, %23"
    )]
    Port,
    /// The form that libpq has for a primary and its standbys.
    #[error(
        "it names several hosts, and payonce connects to one: name an address that always leads to the primary (a virtual IP, a DNS name, HAProxy)"
    )]
    SeveralHosts,
    /// A parameter of libpq that chooses among servers.
    #[error(
        "the parameter {0} is not supported; leave it out: payonce connects to one host, and refuses a standby by itself"
    )]
    Parameter(String),
    /// What sqlx says of another parameter's value.
    #[error("{0}")]
    Other(String),
}

/// The options for a connection to `url`, without the settings of the service:
/// a migration, or a command of an operator, may take its time.
///
/// # Errors
/// What is wrong with the URL, without repeating it: it holds a password.
pub fn connect_options(url: &str) -> Result<PgConnectOptions, UrlError> {
    check(url)?;
    let options = PgConnectOptions::from_str(url).map_err(|error| match error {
        sqlx::Error::Configuration(why) => UrlError::Other(why.to_string()),
        error => UrlError::Other(describe(&error)),
    })?;
    // PGHOST may be what has several.
    if options.get_socket().is_none() && options.get_host().contains(',') {
        return Err(UrlError::SeveralHosts);
    }
    Ok(match options.get_application_name() {
        Some(_) => options,
        None => options.application_name("payonce"),
    })
}

/// Where a connection goes, for people: host and port, or the socket.
#[must_use]
pub fn server_name(options: &PgConnectOptions) -> String {
    match options.get_socket() {
        Some(socket) => socket.display().to_string(),
        None => format!("{}:{}", options.get_host(), options.get_port()),
    }
}

/// What sqlx accepts and should not, or refuses in words that lead astray.
fn check(url: &str) -> Result<(), UrlError> {
    let (scheme, rest) = url.split_once("://").ok_or(UrlError::NotAUrl)?;
    if !scheme.eq_ignore_ascii_case("postgres") && !scheme.eq_ignore_ascii_case("postgresql") {
        let is_scheme = !scheme.is_empty()
            && scheme.len() <= 20
            && scheme.chars().all(|c| c.is_ascii_alphabetic());
        return Err(if is_scheme {
            UrlError::OtherScheme(scheme.to_owned())
        } else {
            UrlError::NotAUrl
        });
    }
    let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let (user, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
    if user.contains('@') || has_stray_at(tail) {
        return Err(UrlError::NotEncoded);
    }
    if hosts.contains(',') {
        return Err(UrlError::SeveralHosts);
    }
    // After an IPv6 address, which is in brackets.
    let after_host = hosts.rsplit_once(']').map_or(hosts, |(_, rest)| rest);
    if let Some((_, port)) = after_host.split_once(':')
        && !port.is_empty()
        && !port.parse::<u16>().is_ok_and(|port| port > 0)
    {
        return Err(UrlError::Port);
    }
    let url = reqwest::Url::parse(url).map_err(|error| UrlError::Other(error.to_string()))?;
    for (name, value) in url.query_pairs() {
        match &*name {
            "host" | "hostaddr" | "port" if value.contains(',') => {
                return Err(UrlError::SeveralHosts);
            }
            "port" if !value.parse::<u16>().is_ok_and(|port| port > 0) => {
                return Err(UrlError::Port);
            }
            "target_session_attrs" | "load_balance_hosts" => {
                return Err(UrlError::Parameter(name.into_owned()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// An @ behind the host is the rest of a password that holds /, ? or #. Only in
/// the value of a parameter it may be meant.
fn has_stray_at(tail: &str) -> bool {
    let (before_fragment, fragment) = tail.split_once('#').unwrap_or((tail, ""));
    let (path, query) = before_fragment
        .split_once('?')
        .unwrap_or((before_fragment, ""));
    let in_a_name = query.split('&').any(|pair| {
        pair.split('=')
            .next()
            .is_some_and(|name| name.contains('@'))
    });
    path.contains('@') || fragment.contains('@') || in_a_name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_that_leads_nowhere_is_refused_by_what_is_wrong() {
        use UrlError::{NotAUrl, NotEncoded, OtherScheme, Parameter, Port, SeveralHosts};
        for (url, expected) in [
            ("garbage", NotAUrl),
            ("host=127.0.0.1 password=hunter2", NotAUrl),
            ("://hunter2@h/db", NotAUrl),
            ("mysql://u:hunter2@h/db", OtherScheme("mysql".to_owned())),
            ("postgres://u:hunter@2@h/db", NotEncoded),
            ("postgres://u:hunter/2@h/db", NotEncoded),
            ("postgres://u:1/2@h/db", NotEncoded),
            ("postgres://u:hunter#2@h/db", NotEncoded),
            ("postgres://u:hunter?2@h/db", NotEncoded),
            ("postgres://u:hunter2@h:port/db", Port),
            ("postgres://u:hunter2@h:0/db", Port),
            ("postgres://u:hunter?a=2@h/db", Port),
            ("postgres://u:hunter2@h/db?port=x", Port),
            ("postgres://u:hunter2@h1:5432,h2:5433/db", SeveralHosts),
            ("postgres://h1,h2/db", SeveralHosts),
            ("postgres://[::1]:5432,[::2]:5432/db", SeveralHosts),
            ("postgres:///db?host=h1,h2", SeveralHosts),
            ("postgres:///db?host=h1%2Ch2&port=1,2", SeveralHosts),
            ("postgres://h/db?hostaddr=::1,::2", SeveralHosts),
            (
                "postgres://h/db?target_session_attrs=read-write",
                Parameter("target_session_attrs".to_owned()),
            ),
        ] {
            let error = connect_options(url).unwrap_err();
            assert_eq!(error, expected, "{url}");
            assert!(!error.to_string().contains("hunter"), "{url}");
        }
        let error = connect_options("postgres://u:hunter2@h/db?sslmode=some").unwrap_err();
        assert!(error.to_string().contains("ssl"), "{error}");
    }

    #[test]
    fn a_url_in_order_is_taken() {
        for (url, server) in [
            ("postgres://u:p@h:5433/db", "h:5433"),
            ("postgresql://u:p%40%2F@[::1]:5433/db", "[::1]:5433"),
            ("POSTGRES://h:5433", "h:5433"),
            ("postgres://h:5433/db?user=a@b&options=-c%20x=1", "h:5433"),
            ("postgres://h:5433/db?user=a@b,c", "h:5433"),
            ("postgres:///db?host=/run/postgresql", "/run/postgresql"),
        ] {
            let options = connect_options(url).unwrap();
            assert_eq!(server_name(&options), server);
        }
    }
}
