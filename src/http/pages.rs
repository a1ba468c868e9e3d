//! What a person sees in a browser: where to begin (`/`), and the description as a
//! page to try it on (`/docs`). All of it is in the binary.

use std::{
    borrow::Cow,
    sync::{Arc, LazyLock},
};

use axum::{
    Router,
    extract::{Path, rejection::PathRejection},
    http::{HeaderName, HeaderValue, header},
    middleware::map_response,
    response::{IntoResponse, Redirect, Response},
    routing::get,
};
use utoipa_swagger_ui::Config;

use crate::error::Error;

/// Nothing from elsewhere is loaded, shown in a frame, or sent anything to: an API
/// key is typed into this page. No `unsafe-inline`: Swagger UI does without, but for
/// icons that stand in its style sheet.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; \
    style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; \
    form-action 'none'; frame-ancestors 'none'";

const HEADERS: [(HeaderName, &str); 3] = [
    (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
    // For browsers that do not know frame-ancestors.
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
];

/// Names what there is, for whoever opens the address of the service.
const INDEX: &str = r#"<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>payonce</title>
</head>
<body>
<h1>payonce</h1>
<p>A payments service whose charges happen once, however often they are asked for.</p>
<ul>
<li><a href="docs/">/docs</a>: the API, and a page to try it on</li>
<li><a href="openapi.json">/openapi.json</a>: its description, for programs</li>
<li><a href="healthz">/healthz</a>: whether the process answers</li>
<li><a href="readyz">/readyz</a>: whether it can take charges</li>
</ul>
</body>
</html>
"#;

static CONFIG: LazyLock<Arc<Config<'static>>> = LazyLock::new(|| {
    // Its default sends the description to a validator on the Internet.
    Arc::new(Config::from("/openapi.json").validator_url("none"))
});

/// The pages' routes.
pub(super) fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/", get(|| async { html(INDEX) }))
        // The page's own links are relative to the slash.
        .route("/docs", get(|| async { Redirect::to("/docs/") }))
        .route("/docs/", get(|| async { file("index.html") }))
        .route("/docs/{*path}", get(docs))
        .layer(map_response(with_headers))
}

async fn with_headers(mut response: Response) -> Response {
    for (name, value) in HEADERS {
        let value = HeaderValue::from_static(value);
        response.headers_mut().insert(name, value);
    }
    response
}

async fn docs(path: Result<Path<String>, PathRejection>) -> Result<Response, Error> {
    // One that is not UTF-8 names no file.
    let Path(path) = path.map_err(|_| Error::RouteUnknown)?;
    file(&path)
}

/// One of Swagger UI's files.
fn file(path: &str) -> Result<Response, Error> {
    let file = utoipa_swagger_ui::serve(path, Arc::clone(&CONFIG))
        .map_err(|_| Error::Internal)?
        .ok_or(Error::RouteUnknown)?;
    if path == "index.html" {
        let page = String::from_utf8_lossy(&file.bytes);
        return Ok(html(page.replacen(
            "<title>Swagger UI</title>",
            "<title>payonce: the API</title>",
            1,
        )));
    }
    let mut response = file.bytes.into_owned().into_response();
    let headers = response.headers_mut();
    let content_type = HeaderValue::try_from(file.content_type).map_err(|_| Error::Internal)?;
    headers.insert(header::CONTENT_TYPE, content_type);
    if file.gzpipped {
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    Ok(response)
}

fn html(page: impl Into<Cow<'static, str>>) -> Response {
    (
        [(header::CONTENT_TYPE, "text/html; charset=utf-8")],
        page.into(),
    )
        .into_response()
}
