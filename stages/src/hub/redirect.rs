//! Where a redirect leads, and how a message says so.

/// The address that a `Location` header at `base` means.
pub fn target(base: &str, location: &str) -> String {
    let (scheme, rest) = base.split_once("://").unwrap_or(("https", base));
    let host = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    let path = rest[host.len()..].split(['?', '#']).next().unwrap_or_default();
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    match location.split('#').next().unwrap_or(location) {
        whole if whole.split(['/', '?']).next().is_some_and(|scheme| scheme.ends_with(':')) => whole.to_owned(),
        other if other.starts_with("//") => format!("{scheme}:{other}"),
        path if path.starts_with('/') => format!("{scheme}://{host}{path}"),
        query if query.starts_with('?') => format!("{scheme}://{host}{path}{query}"),
        relative => format!("{scheme}://{host}{folder}/{relative}"),
    }
}

/// The server of an address, with its port.
pub fn host(address: &str) -> &str {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    let place = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    place.rsplit('@').next().unwrap_or(place)
}

/// Whether both addresses are of one server, so that what one may know the other may too.
pub fn is_same_place(one: &str, other: &str) -> bool {
    let place = |address: &str| address.splitn(4, '/').take(3).collect::<Vec<_>>().join("/").to_ascii_lowercase();
    place(one) == place(other)
}

/// `what` happened at `at`, to a request for `asked`. Signed addresses are not to be written down: what stands behind
/// `?` is left out.
pub fn told(asked: &str, at: &str, what: impl Into<String>) -> String {
    let what = what.into();
    if asked == at {
        return what;
    }
    let shown = at.split('?').next().unwrap_or(at);
    format!("redirected to {shown}: {what}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_read_from_where_it_stands() {
        let base = "http://hub:80/api/models/a/b?blobs=true";
        for (location, wanted) in [
            ("https://cdn/x?sign=1#part", "https://cdn/x?sign=1"),
            ("//cdn/x", "http://cdn/x"),
            ("/login", "http://hub:80/login"),
            ("c?d=http://e/f", "http://hub:80/api/models/a/c?d=http://e/f"),
            ("?page=2", "http://hub:80/api/models/a/b?page=2"),
            ("ftp://x", "ftp://x"),
        ] {
            assert_eq!(target(base, location), wanted);
        }
        assert_eq!(target("http://hub", "x"), "http://hub/x");
        assert_eq!(target("http://hub?a/b", "/x"), "http://hub/x");
    }

    #[test]
    fn a_token_goes_to_one_place() {
        let hub = "https://hub/api?x";
        assert!(is_same_place(hub, "https://HUB/other") && is_same_place(hub, "https://hub"));
        for other in ["http://hub/api", "https://hub:8443/api", "https://hub.example/api", "https://hub@evil/api"] {
            assert!(!is_same_place(hub, other), "{other}");
        }
        assert_eq!((host("https://me:secret@cdn:80/x@y"), host(hub), host("hub?x")), ("cdn:80", "hub", "hub"));
    }

    #[test]
    fn what_signs_an_address_is_not_told() {
        assert_eq!(told("http://hub/a", "http://hub/a", "no"), "no");
        assert_eq!(told("http://hub/a", "https://cdn/a?key=1", "no"), "redirected to https://cdn/a: no");
    }
}
