{{/* Parts that the pods of broker and webhook share. Each takes (dict "root" $ "component" "broker"). */}}

{{/* The labels have no version, so a new chart with the same programs restarts no pod. */}}
{{- define "credence.podMetadata" -}}
{{- $values := index .root.Values .component -}}
labels:
  {{- include "credence.selector" . | nindent 2 }}
  app.kubernetes.io/part-of: credence
  {{- with $values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- $annotations := deepCopy $values.podAnnotations -}}
{{- if .root.Values.metrics.annotatePods }}
{{- $annotations = merge $annotations (dict "prometheus.io/scrape" "true" "prometheus.io/port" "8080" "prometheus.io/path" "/metrics") }}
{{- end }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Fields of the pod's spec, except its containers and volumes. */}}
{{- define "credence.podSpec" -}}
{{- $values := index .root.Values .component -}}
serviceAccountName: credence-{{ .component }}
automountServiceAccountToken: true
enableServiceLinks: false
{{- with .root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  {{- if ne (int .root.Values.runAsUser) -1 }}
  runAsUser: {{ int .root.Values.runAsUser }}
  runAsGroup: {{ int .root.Values.runAsUser }}
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  {{- if $values.topologySpreadConstraints }}
  {{- toYaml $values.topologySpreadConstraints | nindent 2 }}
  {{- else }}
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "credence.selector" $ | nindent 8 }}
    # Each revision of the Deployment spreads on its own. Otherwise an upgrade would leave an uneven spread.
    matchLabelKeys: [pod-template-hash]
  {{- end }}
  {{- end }}
{{- end }}

{{/* Fields of the container, except its name and arguments. */}}
{{- define "credence.container" -}}
{{- $values := index .root.Values .component -}}
image: {{ include "credence.image" (dict "root" .root "image" (index .root.Values.images .component)) | quote }}
imagePullPolicy: {{ .root.Values.images.pullPolicy }}
command: [/credence-{{ .component }}]
terminationMessagePolicy: FallbackToLogsOnError
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- with $values.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* A new pod is ready before an old one terminates, so the number of ready pods never falls below replicas. */}}
{{- define "credence.strategy" -}}
type: RollingUpdate
rollingUpdate:
  maxUnavailable: 0
  maxSurge: 1
{{- end }}

{{- define "credence.disruptionBudget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: credence-{{ .component }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "credence.labels" . | nindent 4 }}
spec:
  # Not minAvailable: with one replica, it would block each drain of the node forever.
  maxUnavailable: 1
  # Pods that are not ready serve nothing, so they may be evicted.
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "credence.selector" . | nindent 6 }}
{{- end }}

{{- define "credence.serviceAccount" -}}
{{- $values := index .root.Values .component -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: credence-{{ .component }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "credence.labels" . | nindent 4 }}
  {{- with $values.serviceAccount.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
# Pods that need the token mount it explicitly.
automountServiceAccountToken: false
{{- end }}

{{/* The Prometheus Operator finds the pods of a component by this object. */}}
{{- define "credence.serviceMonitor" -}}
{{- if .root.Values.metrics.serviceMonitor.enabled }}
---
apiVersion: monitoring.coreos.com/v1
kind: ServiceMonitor
metadata:
  name: credence-{{ .component }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "credence.labels" . | nindent 4 }}
    {{- with .root.Values.metrics.serviceMonitor.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  selector:
    matchLabels:
      {{- include "credence.selector" . | nindent 6 }}
  endpoints:
    - port: http-metrics
      interval: {{ .root.Values.metrics.serviceMonitor.interval }}
{{- end }}
{{- end }}
