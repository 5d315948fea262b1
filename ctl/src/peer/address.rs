// SPDX-License-Identifier: GPL-2.0-or-later

//! Addresses as people write them.

use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::Duration;

use anyhow::{bail, Context, Result};

/// Where a standby listens unless told otherwise.
pub const PORT: u16 = 7072;

/// Splits `HOST`, `HOST:PORT`, `[V6]`, `[V6]:PORT` or a bare IPv6 address.
fn split(text: &str) -> Result<(&str, u16)> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest
            .split_once(']')
            .with_context(|| format!("{text:?} lacks a ]"))?;
        (
            host,
            rest.strip_prefix(':')
                .or(if rest.is_empty() { None } else { Some("") }),
        )
    } else if text.matches(':').count() == 1 {
        let (host, port) = text.split_once(':').unwrap_or((text, ""));
        (host, Some(port))
    } else {
        (text, None)
    };
    if host.is_empty() {
        bail!("{text:?} has no host: write HOST or HOST:PORT");
    }
    match port.map(str::parse) {
        None => Ok((host, PORT)),
        Some(Ok(port)) => Ok((host, port)),
        Some(Err(_)) => bail!("{text:?} has no sensible port: write HOST or HOST:PORT"),
    }
}

fn resolve(text: &str) -> Result<Vec<SocketAddr>> {
    let (host, port) = split(text)?;
    let all: Vec<_> = (host, port)
        .to_socket_addrs()
        .with_context(|| format!("cannot find the address of {host}"))?
        .collect();
    if all.is_empty() {
        bail!("{host} has no address");
    }
    Ok(all)
}

/// Connects to a standby.
pub fn connect(text: &str, patience: Duration) -> Result<TcpStream> {
    let mut last = None;
    for address in resolve(text)? {
        match TcpStream::connect_timeout(&address, patience) {
            Ok(stream) => return Ok(stream),
            Err(e) => last = Some((address, e)),
        }
    }
    let (address, e) = last.context("no address")?;
    bail!("the standby {address} cannot be reached ({e}): start remusctl standby there, and let port {} through its firewall", address.port())
}

/// Listens for a primary.
pub fn listen(text: &str) -> Result<TcpListener> {
    let addresses = resolve(text)?;
    TcpListener::bind(&addresses[..]).map_err(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => anyhow::anyhow!(
            "port {text} is in use here, maybe by another standby: end that, or choose another with --listen ADDR:PORT"
        ),
        _ => anyhow::anyhow!("cannot listen on {text}: {e}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        assert_eq!(split("beta").unwrap(), ("beta", PORT));
        assert_eq!(split("10.0.0.1:80").unwrap(), ("10.0.0.1", 80));
        assert_eq!(split("::1").unwrap(), ("::1", PORT));
        assert_eq!(split("[::1]").unwrap(), ("::1", PORT));
        assert_eq!(split("[::1]:80").unwrap(), ("::1", 80));
        for bad in [
            "", ":80", "a:", "a:b", "a:99999", "[::1", "[::1]80", "[]:80",
        ] {
            assert!(split(bad).is_err(), "{bad}");
        }
    }
}
